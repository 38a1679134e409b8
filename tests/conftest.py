import torch

# torchtyping 0.1.5 reads Tensor.names, which PyTorch 2.13 no longer has.
if not hasattr(torch.Tensor, "names"):
    torch.Tensor.names = property(lambda tensor: (None,) * tensor.ndim)
