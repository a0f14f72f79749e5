"""What this machine is: the device under a file, memory limits, this process's own memory."""
