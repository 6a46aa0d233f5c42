"""Training of the embedded model: data, autoencoder, denoiser and export.

Nothing here is imported when the sidecar serves requests; the heavy libraries are
loaded by the modules that need them and never by this package itself.
"""
