"""A campaign of a thousand faults: runs are hit, started again with the same command, and compared with calm ones.

python -m benchmarks.faults                                the whole campaign, or what is left of it
python -m benchmarks.faults --minutes 10                   a part of it; the next call goes on
python -m benchmarks.faults --kind zombie --count 100      of a campaign of 100 faults, the kinds named so

strike     in a driver: at which operation on the store what happens
driver     one process that edits, forked from one that has imported everything
stores     files, an S3 server with conditional puts, one without, and a proxy before each
judge      what stands in the run's folder against the undisturbed run's
stage      what a kind of fault is played on: calm runs, folders to begin with
kinds      the faults of one process or several; on_ray: those of a cluster
campaign   what is to be done, what was done already (build/faults/), the sums (build/faults.json)
"""
