"""One self-contained HTML page that compares runs: accuracy, curves, pages with boxes, the graph."""
