"""What starts and supervises training workers: this process or torchrun, and Ray Train."""
