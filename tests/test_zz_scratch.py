import sys; sys.path.insert(0,'/work/main/tests')
import pytest
from test_learner import *
@pytest.mark.parametrize("lora",[None,LORA])
def test_x(initial,pairs,tmp_path,lora):
    res={}
    for size in (1,2,4,64):
        l=learner_of(initial,lora=lora); b=weights_of(l)
        train(l,pairs,tmp_path/str(size),DPO.model_copy(update={"micro_batch_size":size})); res[size]=weights_of(l)
    for s in (2,4,64): print("lora" if lora else "full", s, apart(res[s],res[1],b), farthest(res[s],res[1]), farthest(res[1],b))
    # a wrong order for scale: 
