"""Parts of all fused attention kernels."""
