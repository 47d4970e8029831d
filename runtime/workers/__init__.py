"""Who makes a job: processes on this machine, or on others."""
