"""What sets the published methods apart: losses, weights over time, gradients; the original EASE's API."""
