"""What the smaller commands do: each module computes a result that is JSON as it stands, and shows it to people."""
