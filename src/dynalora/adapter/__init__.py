"""The shared form of all methods: layer, PEFT tuner, configuration, kernel, spectra."""
