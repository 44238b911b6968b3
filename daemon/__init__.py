"""What every daemon of ours needs: settings from four places, structured logs, health and metrics, sd_notify."""
