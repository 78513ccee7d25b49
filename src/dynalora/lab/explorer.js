"use strict";
// Plots that can be read off and zoomed, with axes to choose: drawn by plotly from the data that lie beside them.
// The page carries plotly packed, a third of its size; a browser that cannot unpack it shows the pictures alone.
(async () => {
  const unpack = async (base64) => {
    const bytes = Uint8Array.from(atob(base64), (sign) => sign.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const library = document.createElement("script");
  library.textContent = await unpack(document.getElementById("plotly").textContent);
  document.head.append(library); // runs at once, since the page's policy names it by its hash
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  for (const figure of document.querySelectorAll(".explorer")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const canvas = figure.querySelector(".canvas");
    const choice = (axis) => figure.querySelector(`[data-axis=${axis}]`).value;
    const draw = () => {
      const [x, y] = [choice("x"), choice("y")];
      const [ink, soft, line] = [color("--text"), color("--soft"), color("--line")];
      const shown = (points) => points.filter((point) => point.values[x] != null && point.values[y] != null);
      const named = new Set();
      const traces = data.lines.filter((each) => shown(each.points).length).map((each) => {
        const points = shown(each.points);
        const first = !named.has(each.label);
        named.add(each.label);
        const paint = each.color === "#000000" ? ink : each.color;
        return {
          type: "scatter", mode: points.length > 1 ? "lines+markers" : "markers", name: each.label,
          legendgroup: each.label, showlegend: first,
          x: points.map((point) => point.values[x]), y: points.map((point) => point.values[y]),
          text: points.map((point) => point.note), hovertemplate: "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
          line: { color: paint, width: 1.5 },
          marker: {
            color: paint, symbol: each.symbol, size: points.map((point) => (point.marked ? 14 : 7)),
            line: { color: ink, width: points.map((point) => (point.marked ? 2 : 0)) },
          },
        };
      });
      // What is shown at first: all points below the largest values that are asked for.
      const near = { x: [], y: [] };
      const below = (key, value) => !(value > (data.highest[key] ?? Infinity));
      for (const trace of traces) {
        trace.x.forEach((value, index) => {
          if (below(x, value) && below(y, trace.y[index])) {
            near.x.push(value);
            near.y.push(trace.y[index]);
          }
        });
      }
      const cut = traces.some((trace) => trace.x.some((value, index) => !below(x, value) || !below(y, trace.y[index])));
      const range = (values, log) => {
        const [low, high] = [Math.min(...values), Math.max(...values)].map((value) => (log ? Math.log10(value) : value));
        const room = 0.06 * (high - low) || 0.06 * Math.abs(high) || 1;
        return [low - room, high + room];
      };
      const axis = (name) => {
        const positive = traces.every((trace) => trace[name].every((value) => value > 0));
        const key = name === "x" ? x : y;
        const log = positive && data.log.includes(key);
        return {
          title: { text: data.quantities[key], standoff: 8 }, type: log ? "log" : "linear",
          ...(cut && near[name].length ? { range: range(near[name], log), autorange: false } : { autorange: true }),
          gridcolor: line, zerolinecolor: line, linecolor: soft, tickcolor: soft, automargin: true,
        };
      };
      const layout = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: 12 },
        margin: { l: 50, r: 10, t: 30, b: 50 }, hovermode: "closest", dragmode: "zoom",
        legend: { orientation: "h", y: -0.2 }, xaxis: axis("x"), yaxis: axis("y"),
        hoverlabel: { bgcolor: color("--card"), bordercolor: soft, font: { color: ink } },
      };
      const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
      Plotly.react(canvas, traces, layout, options);
    };
    figure.hidden = false;
    figure.querySelectorAll("select").forEach((select) => select.addEventListener("change", draw));
    dark.addEventListener("change", draw);
    draw();
  }
})();
