"""The walk: find a model's blocks, capture what their linears see, quantize them one block after another."""
