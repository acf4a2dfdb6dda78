"""The recipe behind the pipelines that ship with the package: `python -m diffalign.shapes.pretrain --out DIR`.

Data are rendered, an autoencoder and then a denoiser with its text encoders are trained, and an ordinary diffusers folder is
written with a log, the score per task and a picture of samples. Everything follows from one seed.
"""
