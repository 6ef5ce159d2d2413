"""What the fused kernels of attention share."""
