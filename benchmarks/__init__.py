"""What the SDK costs (latency) and what it gives (quality), beside plain interpolation."""
