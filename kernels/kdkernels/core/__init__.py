"""Machinery that belongs to no single loss, and the contract between the losses and the back ends."""
