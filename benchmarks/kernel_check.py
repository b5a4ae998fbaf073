import torch

from framequant import storage
from framequant.codes.grid import GridSpec
from framequant.codes.trellis import TrellisSpec
from framequant.frames import build_frame, choose_frame
from framequant.kernels import reference
from framequant.kernels.product_triton import dequantize, product
from framequant.kernels.transform_plan import transform_plan
from framequant.kernels.transform_triton import transform
from framequant.kernels.words import stored_bytes, to_words, word_layout
from framequant.spec import LinearSpec

torch.manual_seed(0)
dev = "cuda" if torch.cuda.is_available() else "cpu"


def rnd(spec):
    t = {}
    for n, (s, d) in storage.layout(spec).items():
        t[n] = (
            torch.randint(0, 256, s, dtype=torch.uint8)
            if d == torch.uint8
            else (torch.rand(s) * 0.1 + 0.05).to(d)
        )
    return {k: v.to(dev) for k, v in t.items()}


def run(o, i, code, two, M, dtype=torch.float16, splits=1, **cfg):
    fin = choose_frame(i, 1.125, seed=3)
    fout = choose_frame(o, 1.125 if two else 1.0, seed=5)
    spec = LinearSpec(i, o, fin, fout, code)
    t = rnd(spec)
    lay = word_layout(spec)
    w = to_words(t["packed_codes"], spec, lay)
    assert torch.equal(stored_bytes(w, spec, lay), t["packed_codes"])
    fi, fo = build_frame(fin), build_frame(fout)
    pa = transform_plan(fi, True, dev)
    ps = transform_plan(fo, False, dev)
    x = torch.randn(M, i, device=dev).to(dtype) * 100
    rows, cols = spec.coefficient_shape
    cpw = lay.codes_per_word
    z = torch.zeros(M, cpw, lay.words, dtype=torch.float16, device=dev)
    unit = torch.empty(M, device=dev)

    def apply(p, x, out, ana, parts=1, il=1, words=0):
        f = p.sizes
        q = p.padded
        transform[(M, p.num_rows)](
            x,
            p.signs,
            *p.matrices,
            x,
            out,
            unit,
            M,
            x.stride(-2),
            x.stride(0) if parts > 1 else 0,
            words,
            p.norm,
            *f,
            *q,
            ROWS=16,
            PARTS=parts,
            ANALYSIS=ana,
            INTERLEAVE=il,
            BIAS=False,
            LOW=True,
            PDL=False,
        )

    apply(pa, x, z, True, il=cpw, words=lay.words)
    zr = fi.analysis(x.double())
    zz = z.transpose(1, 2).reshape(M, -1)[:, :cols].double() * unit.double()[:, None]
    e1 = (zz - zr).norm() / zr.norm()
    c = {"BR": 64, "BK": 16, "BN": 16, "STAGES": 2}
    c.update(cfg)
    span = -(-lay.words // splits)  # deliberately no multiple of BK
    u = torch.full((splits, M, rows), float("nan"), device=dev)
    product[(-(-rows // c["BR"]), splits, -(-M // c["BN"]))](
        w,
        z,
        t["scales"],
        u,
        rows,
        lay.words,
        lay.stride,
        span,
        M,
        lay.factor,
        TRELLIS=lay.trellis,
        BITS=lay.bits,
        MULTIPLIER=lay.multiplier,
        ADDEND=lay.addend,
        CENTRED=True,
        ROW_SCALES=t["scales"].numel() > 1,
        PDL=False,
        PREFETCH=0,
        **c,
    )
    D = storage.decode_rows(spec, t, 0, rows, torch.float64)
    ur = zz @ D.T
    uu = u.sum(0).double() * unit.double()[:, None]
    e2 = (uu - ur).norm() / ur.norm()
    y = torch.empty(M, o, dtype=dtype, device=dev)
    apply(ps, u, y, False, parts=splits)
    yr = fo.synthesis(zr @ D.T)
    e3 = (y.double() - yr).norm() / yr.norm()
    pan = torch.full((rows, cpw, lay.words), float("nan"), dtype=torch.float16, device=dev)
    dequantize[(-(-rows // 32), -(-lay.words // 16))](
        w,
        t["scales"],
        pan,
        rows,
        lay.words,
        lay.stride,
        lay.factor,
        TRELLIS=lay.trellis,
        BITS=lay.bits,
        MULTIPLIER=lay.multiplier,
        ADDEND=lay.addend,
        ROW_SCALES=t["scales"].numel() > 1,
        BR=32,
        BK=16,
    )
    e4 = (pan.transpose(1, 2).reshape(rows, -1)[:, :cols].double() - D).norm() / D.norm()
    # reference in same dtype
    tr = reference.synthesis(fo, reference.product(reference.analysis(fi, x), spec, t))
    e5 = (tr.double() - yr).norm() / yr.norm()
    print(
        o,
        i,
        type(code).__name__,
        dtype,
        f"analysis {e1:.1e} product {e2:.1e} panel {e4:.1e} total {e3:.2e} reference {e5:.2e} ratio {e3 / e5:.2f}",
    )


def attempt(*a, **k):
    try:
        run(*a, **k)
    except Exception as e:
        print(a, k, "!!", type(e).__name__, str(e)[:300])


if __name__ == "__main__":

    def g(n):
        return GridSpec("sigma_clip", n, "symmetric")

    attempt(128, 256, g(4), False, 3)
    attempt(192, 576, g(2), True, 2, splits=2)
    attempt(192, 576, g(16), True, 17, torch.bfloat16)
    attempt(160, 1376, TrellisSpec(12, (2,)), False, 3)
    if dev == "cuda":
        attempt(4096, 4096, g(4), False, 1, BR=64, BK=64, BN=8, STAGES=4, splits=4)
        attempt(4096, 4096, g(4), False, 1, BR=16, BK=64, BN=8, STAGES=4, splits=2, num_warps=1)
        attempt(4096, 4096, g(4), True, 16, BR=64, BK=64, BN=16, STAGES=3, splits=4)
        attempt(11008, 4096, g(4), False, 8, torch.bfloat16, BR=64, BK=64, BN=8, STAGES=3, splits=2)
        attempt(4096, 11008, g(4), False, 2, torch.bfloat16, BR=64, BK=64, BN=8, STAGES=3, splits=2)
        attempt(8192, 28672, g(4), False, 2, BR=64, BK=64, BN=8, STAGES=3, splits=2)
        attempt(1024, 2048, g(4), False, 300, BR=128, BK=32, BN=128, STAGES=2, num_warps=8)
        attempt(4096, 4096, TrellisSpec(12, (2,)), False, 1, BR=64, BK=32, BN=8, STAGES=3, splits=4)
        attempt(4096, 4096, TrellisSpec(16, (2,)), False, 16, BR=64, BK=32, BN=16, STAGES=3, splits=4)
