"""What the integers mean: scalar grids, trellis codes, and the bytes that hold them."""
