"""Pictures as files and as pixels, and what a stock pipeline draws them with: noise and schedulers."""
