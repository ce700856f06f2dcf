from benchmarks.against_diffusers import cases, compare
if __name__=="__main__":
    c=[c for c in cases() if c.name=="tiny, four edits of each image"][0]
    print(compare(c, rounds=4), flush=True)
