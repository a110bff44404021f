"""What the kernel headers say: request numbers, structs and bits. Data only, no I/O."""
