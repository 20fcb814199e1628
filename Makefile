# make demo | test | test-all | tower | ckpt | untold | clean
#
# Each target makes .venv first when it is missing or its requirements changed. An installed torch
# 2.11-2.13 (of the python3 on your PATH) is used as it is; otherwise 2.13.0 goes into .venv.
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu make demo     a smaller torch without CUDA
#   PYTHON=python3.12 make test                                    another interpreter

PYTHON ?= python3
TORCH_INDEX ?=
PY = .venv/bin/python
HAVE = import torch, sys; sys.exit(not (2, 11) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 13))

.PHONY: demo test test-all tower ckpt untold clean

demo: .venv/ready
	$(PY) -m lab.demo $(ARGS)

test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not slow" $(ARGS)

test-all: .venv/peers
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --durations=10 $(ARGS)

# The checkpoints in ckpt/. `make tower` trains the vision tower of each stage, in about twenty
# minutes on one core; `make ckpt` trains a model like the demo's from ckpt/semantic, on twice as
# many questions.
tower: .venv/ready
	$(PY) train_vit.py --steps=1200 --out=out/tower --keep=ckpt

ckpt: .venv/ready
	$(PY) -m lab.demo --tower_steps=0 --rows=2 --steps=2600 --own_question=false \
	    --rl_steps=0 --out=out/ckpt --keep=ckpt/demo $(ARGS)

.venv/ready: requirements.txt
	@if $(PYTHON) -c '$(HAVE)' 2>/dev/null; then \
	    echo "making .venv on top of the torch that is installed"; \
	    $(PYTHON) -m venv --system-site-packages .venv; \
	    grep -v '^torch==' requirements.txt > .venv/requirements.txt; \
	else \
	    echo "making .venv with torch 2.13.0 (some minutes the first time)"; \
	    $(PYTHON) -m venv .venv; \
	    cp requirements.txt .venv/requirements.txt; \
	    .venv/bin/pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0; \
	fi
	.venv/bin/pip install -q -r .venv/requirements.txt
	@touch $@

# The pin keeps a peer from replacing torch by a newer one. transformers' processor needs the
# torchvision of the same torch (2.13: 0.28). It goes to a folder of its own, which only
# tests/hub_peer.py looks into: on a CPU build of torch a wheel for CUDA breaks whatever imports it.
VISION = import torch; print("torchvision==0.%d.*" % (int(torch.__version__.split(".")[1]) + 15))
.venv/peers: .venv/ready requirements-peers.txt
	@echo "adding the packages that tests compare with"
	$(PY) -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > .venv/pin.txt
	.venv/bin/pip install -q -c .venv/pin.txt -r requirements-peers.txt
	.venv/bin/pip install -q --no-deps "timm>=1.0.31"
	$(PY) -c '$(VISION)' > .venv/vision.txt
	.venv/bin/pip install -q --no-deps --upgrade --target .venv/torchvision -r .venv/vision.txt \
	    $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

# Where the demo's second world begins: all but forms first, then single clicks on forms for so short
# a time that the model still tries other things. What tries nothing is never rewarded.
OTHERS = shape_attr:1.5,counting:0.8,ocr_line:1.2,point:1.2,gui_click:1.4
untold: .venv/ready
	$(PY) pretrain.py --mix=$(OTHERS) --vit=ckpt/semantic --levels=1 --mtp=0 --steps=1900 \
	    --out=out/untold/others
	$(PY) pretrain.py --mix=$(OTHERS),gui_form:1.6 --parts=gui_form --init=out/untold/others \
	    --levels=1 --mtp=0 --lr=2e-3 --steps=250 --out=out/untold/forms
	$(PY) -m lab.worlds --world=untold --init=out/untold/forms --out=out/untold --keep=ckpt/untold

clean:
	rm -rf .venv out
