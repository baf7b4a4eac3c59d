"""Plain Triton: any CUDA GPU of capability 8.0 or newer, and Triton's CPU interpreter."""
