"""What the Triton kernels of every family share: `kernels` for code on a device, `launches` for what starts it."""
