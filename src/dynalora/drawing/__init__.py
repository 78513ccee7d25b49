"""Every figure of the package: how it looks, and how it is written.

Functions take what was measured and return a matplotlib figure, which [`save`][dynalora.drawing.style.save] writes as
PNG and SVG. [`style`][dynalora.drawing.style] decides on colours, markers, lines and hatches, so that a method looks
the same in every figure and figures can be read in black and white. Matplotlib is imported when a figure is drawn.
"""
