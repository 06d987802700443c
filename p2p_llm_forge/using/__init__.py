"""What one does with a trained model: let it write, and take it along in another format."""
