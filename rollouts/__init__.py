"""Trajectories and the engines that make them."""
