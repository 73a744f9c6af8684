"""What the tests share: accuracy, layouts, samples and standing checks."""
