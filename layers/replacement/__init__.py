"""What is done to models that exist: layers swapped for their twins and back, batch norms folded, paths explained."""
