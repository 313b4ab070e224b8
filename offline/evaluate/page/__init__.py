"""`infoquant report`: write a page about a checkpoint, one HTML file without scripts or outside resources."""
