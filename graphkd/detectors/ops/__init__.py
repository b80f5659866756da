"""Operations of detectors on all pages of a batch at once: fixed shapes, no loop over pages, no wait for the GPU."""
