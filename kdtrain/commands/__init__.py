"""The sub-commands of `kdtrain`, one file each."""
