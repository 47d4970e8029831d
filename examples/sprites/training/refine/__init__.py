"""What is done to a trained model: widen, polish, distil."""
