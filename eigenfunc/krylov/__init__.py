"""Pure kernels: fixed shapes, tensors only, no host reads, so that vmap, jvp, grad and compile go through them."""
