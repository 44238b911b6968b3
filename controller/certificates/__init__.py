"""The certificates that admission is served with: made, renewed and handed out by the controller itself."""
