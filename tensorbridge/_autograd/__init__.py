"""The autograd graph of a tensor as data and as a picture, and the honest way to write into a tensor."""
