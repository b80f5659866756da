"""The command line. Commands live in one module each; heavy imports happen inside them."""
