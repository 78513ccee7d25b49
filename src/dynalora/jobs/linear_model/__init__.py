"""The linear model in which a fixed update must fail and a gated one need not (DISeL §2, App. I).

Inputs come in equal parts from two Gaussian populations with the same covariance Σ, a fine-tuning population with mean
μ_F and a pre-training population with mean μ_P. Targets are

    y = (W0 + ΔW*)·x   for inputs of the fine-tuning population,
    y = W0·x           for inputs of the pre-training population,

and the loss is the squared error ‖ŷ − y‖². Known in closed form are

* the best fixed correction, ΔW*·M_F·(M_F + M_P)⁻¹ with the second moments M = E[x xᵀ] (eq. 16), which is ½ΔW* for means
  ±μ (eq. 18), and its loss;
* the Bayes-optimal correction p(x)·ΔW* with the posterior p(x) = σ(wᵀx + c), w = Σ⁻¹(μ_F − μ_P) and
  c = ½(μ_Pᵀ Σ⁻¹ μ_P − μ_Fᵀ Σ⁻¹ μ_F) (eq. 28–30), and its loss, the least that any correction can have (eq. 25).

[`run_linear_model`][dynalora.jobs.linear_model.report.run_linear_model] trains full fine-tuning, PEFT's LoRA and
DISeL on samples of the mixture, and compares where they end with the two closed forms.
"""
