"""Building blocks of the kernels; none knows a kernel.

ptx <- tiles, sync, work, rows <- loads, mask, softmax, store, handover, convert <- requests, results."""
