"""What makes the embedded model: data, training, judges. Run as `python -m tiny`; README.md tells how."""
