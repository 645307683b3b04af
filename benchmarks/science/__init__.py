"""Published facts about the spectra of networks, reproduced on handwritten digits: `python -m benchmarks.science`."""
