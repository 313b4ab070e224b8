"""`infoquant report`: a checkpoint as a page for researchers, one file without scripts or outside resources."""
