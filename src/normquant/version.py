"""The version of this package, in one place: the build reads it here too."""

VERSION = "0.1.0"
