"""Starting workers, giving them passes, watching them, starting again. The room of Ray."""
