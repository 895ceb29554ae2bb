"""Trials of ideas for the pixel decoder, on the frozen codes of a trained Fashion-MNIST pipeline.

    OMP_NUM_THREADS=1 python examples/search_decoders.py '{"mass": "cos"}' 6 runs/fashion_mnist
        one idea, 6 CPU-minutes: trains on 55,000 images of the cached training split, prints
        bits/dim of the other 5,000.
"""
# ruff: noqa
import sys,time,torch,numpy as np,json,math,os
torch.set_num_threads(int(os.environ.get('NT','1')))
import torch.nn.functional as F
from torch import nn
from progressive_vae.configuration import *; from progressive_vae.level import *
from progressive_vae import decoders as D
from progressive_vae.decoders import Group
from progressive_vae.networks import *
from progressive_vae.codes import GridDataset
opt=json.loads(sys.argv[1]); minutes=float(sys.argv[2])
o=dict(order='7',attn=0,gated=0,shared=0,mass='cat',width=96,layers=2,lr=4e-3,B=64,expand=1,trunk=0,conv='3',symbol=0,fused=0,E=64,sc=1.0); o.update(opt)

class Attn(nn.Module):
    def __init__(s,w):
        super().__init__(); s.norm=ChannelNorm(w); s.qkv=nn.Conv2d(w,3*w,1); s.out=ZeroConv2d(w,w,1); s.h=max(1,w//32); s.pos=nn.Parameter(torch.zeros(w,7,7))
    def forward(s,x):
        B,C,H,W=x.shape
        q,k,v=s.qkv(s.norm(x)+s.pos.to(x.dtype)).flatten(2).chunk(3,1)
        f=lambda t:t.view(B,s.h,C//s.h,H*W).transpose(2,3)
        y=F.scaled_dot_product_attention(f(q),f(k),f(v)).transpose(2,3).reshape(B,C,H,W).contiguous(memory_format=torch.channels_last)
        return x+s.out(y)
class Gated(nn.Module):
    def __init__(s,w):
        super().__init__(); s.norm=ChannelNorm(w); s.conv1=nn.Conv2d(w,w,3,padding=1); s.conv2=ZeroConv2d(w//2,w,3,padding=1)
    def forward(s,x):
        a,b=s.conv1(s.norm(x)).chunk(2,1); return x+s.conv2(a*F.silu(b))
class Block(nn.Module):
    def __init__(s,w,e):
        super().__init__(); m=int(w*e); s.norm=ChannelNorm(w); s.conv1=nn.Conv2d(w,m,3,padding=1); s.conv2=ZeroConv2d(m,w,3 if o['conv']=='3' else 1,padding=1 if o['conv']=='3' else 0)
    def forward(s,x): return x+s.conv2(F.silu(s.conv1(s.norm(x))))
def blocks(w,n,stride):
    l=[]
    for i in range(n):
        l.append(Gated(w) if o['gated'] else Block(w,o['expand']))
    if o['attn'] and stride==cfg.downsample: l.insert(0,Attn(w))
    return nn.Sequential(*l)
class CE(torch.autograd.Function):
    @staticmethod
    def forward(ctx,logits,values):
        lp=logits.float()
        p=lp.log_softmax(-1); n=-p.gather(1,values[:,None])[:,0]
        ctx.save_for_backward(p.exp_().to(logits.dtype),values); return n
    @staticmethod
    def backward(ctx,g):
        p,v=ctx.saved_tensors
        d=p*g[:,None].to(p.dtype); d.scatter_add_(1,v[:,None],-g[:,None].to(p.dtype)); return d,None
def order(ds):
    if o['order']=='7': return D.lattice_order(ds)
    if o['order']=='16':
        offs=[(0,0),(2,2),(0,2),(2,0),(1,1),(3,3),(1,3),(3,1),(0,1),(2,3),(0,3),(2,1),(1,0),(3,2),(1,2),(3,0)]
        return [Group(4,x) for x in offs]
    if o['order']=='10': # stride 4 groups, then stride 2 (1,1) at 14, then 7x7... 
        return D.lattice_order(ds)[:4]+[Group(4,x) for x in [(1,1),(3,3),(1,3),(3,1)]]+[Group(2,(0,1)),Group(2,(1,0))]
M=10
class CosHead(nn.Module):
    def __init__(s,w,E):
        super().__init__(); s.a=ZeroLinear(w,E); x=torch.linspace(0,2,256); k=torch.arange(1,E+1)
        s.table=nn.Parameter(o['sc']*2**.5*torch.cos(math.pi/2*k*x[:,None])); s.bias=nn.Parameter(torch.zeros(256))
    def forward(s,f): return F.linear(s.a(f),s.table,s.bias)
class Dec(nn.Module):
    def __init__(s,c):
        super().__init__(); w=c.hidden_size; s.c=c; s.groups=order(c.downsample)
        s.embedding=(PixelEmbedding if c.is_finest else nn.Embedding)(c.num_values,16); s.stem=nn.Conv2d(c.codebook_dim,w,3,padding=1)
        s.trunk=blocks(w,o['trunk'],0)
        strides=[c.downsample]+[g.stride for g in s.groups]
        s.st=nn.ModuleList(); shared={}
        for b,g in zip(strides,s.groups):
            m=nn.Module(); m.up=nn.Sequential(*(Upsample(w) for _ in range(int(math.log2(max(1,b//g.stride))))))
            bl=blocks(w,o['layers'] if isinstance(o['layers'],int) else o['layers'][len(s.st)],g.stride)
            if o['shared']: bl=shared.setdefault(g.stride,bl)
            m.blocks=bl; m.down=None
            m.head=nn.Sequential(ChannelNorm(w),nn.Conv2d(w,w,1)); m.logits=ZeroLinear(w,c.num_values) if o['mass']=='cat' else ZeroLinear(w,3*M) if o['mass']=='log' else CosHead(w,o['E'])
            if g is not s.groups[-1]: m.take=nn.Conv2d(16,w,3,padding=1)
            s.st.append(m)
        s.register_buffer('mu0',torch.linspace(-1.2,1.2,M))
    def nats(s,logits,v):
        if o['mass']!='log':
            if o['fused']: return CE.apply(logits.flatten(0,-2),v.flatten())
            return F.cross_entropy(logits.flatten(0,-2).float(),v.flatten(),reduction='none')
        l=logits.flatten(0,-2).float(); pi,mu,ls=l.chunk(3,-1); mu=mu+s.mu0; inv=torch.exp(-(ls-2.).clamp_min(-7)); x=(v.flatten()[:,None]/127.5-1)-mu
        up=inv*(x+1/255); lo=inv*(x-1/255); v=v.flatten()[:,None]
        cu=torch.where(v==255,1.,up.sigmoid()); cl=torch.where(v==0,0.,lo.sigmoid())
        lp=torch.where(v==0,F.logsigmoid(up),torch.where(v==255,F.logsigmoid(-lo),(cu-cl).clamp_min(1e-12).log()))
        return -torch.logsumexp(lp+pi.log_softmax(-1),-1)
    def loss(s,q,x):
        state=s.trunk(s.stem(q).contiguous(memory_format=torch.channels_last)); t=0
        ih,iw=s.c.downsample*q.shape[-2],s.c.downsample*q.shape[-1]; H,W=x.shape[-2:]; ins=torch.zeros(ih,iw); ins[:H,:W]=1
        x=F.pad(x,(0,iw-W,0,ih-H))
        for g,m in zip(s.groups,s.st):
            state=m.blocks(m.up(state)); f=m.head(state).movedim(1,-1); v=g.of(x)[:,0]
            ma=g.of(ins)
            t=t+(s.nats(m.logits(F.silu(f)),v)*ma.expand(v.shape).flatten()).sum()
            if g is not s.groups[-1]:
                e=s.embedding(v)
                state=state+m.take(e.movedim(-1,1))
        return t
G=7
class BNorm(nn.Module):
    def __init__(s,w): super().__init__(); s.n=nn.LayerNorm(w); s.w=w; s.g=nn.Parameter(torch.ones(G*w))
    def forward(s,x):
        y=x.movedim(1,-1); y=s.n(y.unflatten(-1,(G,s.w))).flatten(-2); return (y*s.g.to(y.dtype)).movedim(-1,1)
class BConv(nn.Conv2d):
    def __init__(s,wi,wo,strict=False,zero=False):
        super().__init__(G*wi,G*wo,3,padding=1)
        o=torch.arange(G*wo)//wo; i=torch.arange(G*wi)//wi
        s.register_buffer('m',((o[:,None]>i[None]) if strict else (o[:,None]>=i[None])).float()[:,:,None,None])
        nn.init.zeros_(s.bias)
        if zero: nn.init.zeros_(s.weight)
        else: nn.init.normal_(s.weight,std=(s.weight[0].numel()*.55)**-.5)
    def forward(s,x): return F.conv2d(x,s.weight*s.m,s.bias,padding=1)
class Causal(nn.Module):
    def __init__(s,c):
        super().__init__(); w=o['width']; s.w=w; s.groups=D.lattice_order(4)
        s.sub=[[(a,b) for a in range(4) for b in range(4) if (a-g.offset[0])%g.stride==0 and (b-g.offset[1])%g.stride==0] for g in s.groups]
        s.emb=PixelEmbedding(256,16); s.inp=nn.ModuleList(nn.Conv2d(16*len(q),w,1) for q in s.sub)
        s.first=BConv(w,w,strict=True); s.stem=nn.Conv2d(c.codebook_dim,G*w,3,padding=1)
        s.b=nn.ModuleList(nn.ModuleList([BNorm(w),BConv(w,w),BConv(w,w,zero=True)]) for _ in range(o['layers']))
        s.heads=nn.ModuleList(nn.ModuleList([nn.LayerNorm(w),nn.Linear(w,96*len(q)),ZeroLinear(96,256)]) for q in s.sub)
    def loss(s,q,x):
        ph=F.pad(x,(0,28-x.shape[-1],0,28-x.shape[-2]))[:,0]
        vals=[torch.stack([ph[:,a::4,b::4] for a,b in sub],-1) for sub in s.sub]
        h=torch.cat([m(s.emb(v).flatten(-2).movedim(-1,1)) for m,v in zip(s.inp,vals)],1).contiguous(memory_format=torch.channels_last)
        h=s.first(h)+s.stem(q)
        for n,c1,c2 in s.b: h=h+c2(F.silu(c1(n(h))))
        t=0
        for blk,hd,v in zip(h.movedim(1,-1).split(s.w,-1),s.heads,vals):
            f=hd[1](hd[0](blk)).unflatten(-1,(v.shape[-1],96)); lg=hd[2](F.silu(f))
            t=t+F.cross_entropy(lg.flatten(0,-2).float(),v.flatten(),reduction='sum')
        return t
R=sys.argv[3]
i1=2 if not o['symbol'] else 1
level=ProgressiveVAELevel.from_pretrained(f'{R}/level_{i1}')
cfg=level.config; cfg.hidden_size=o['width']
fin=GridDataset(f'{R}/cache/pixels/train' if i1==2 else f'{R}/cache/level_2/train'); z=GridDataset(f'{R}/cache/level_{i1}/train')
X=fin.batch(slice(0,60000))[0]; Z=z.batch(slice(0,60000))[0]
if X.ndim==3: X=X[:,None]
if i1==2: X=X.to(torch.uint8)
torch.manual_seed(0)
d=Causal(cfg) if o['order']=='causal' else Dec(cfg)
for m in d.modules():
    if not isinstance(m,BConv): init_weights(m)
    if isinstance(m,Attn): nn.init.zeros_(m.pos)
d=d.to(memory_format=torch.channels_last)
print(sum(p.numel() for p in d.parameters())/1e6,'M')
lr=o['lr'];B=o['B']
op=torch.optim.AdamW(d.parameters(),lr=lr,betas=(0.9,0.99),weight_decay=0.01)
step=0;tot=minutes*60;acc=[];t0=time.process_time(); w0=time.time()
N=55000; perm=torch.randperm(60000,generator=torch.Generator().manual_seed(1)); tr,va=perm[:N],perm[N:]
ema=[p.detach().clone() for p in d.parameters()]
while (el:=time.process_time()-t0)<tot:
    i=tr[torch.randint(N,(B,))]; f=el/tot
    for g in op.param_groups: g['lr']=lr*min(1,(step+1)/100)*(0.5+0.5*math.cos(math.pi*f))
    with torch.autocast('cpu',torch.bfloat16): l=d.loss(level.quantizer.lookup(Z[i]),X[i].long())/X[0].numel()/B
    op.zero_grad(); l.backward(); torch.nn.utils.clip_grad_norm_(d.parameters(),1.0); op.step()
    acc.append(l.item()/0.693147); step+=1
    k=min(0.999,(1+step)/(10+step))
    torch._foreach_lerp_(ema,[p.detach() for p in d.parameters()],1-k)
    if step%200==0: print(step,round(el),'train',round(float(np.mean(acc[-200:])),4),'img/cpu-s',round(B*step/el,1),'wall',round(time.time()-w0),flush=True)
for p,e in zip(d.parameters(),ema): p.data.copy_(e)
d.eval(); t=0
with torch.no_grad():
    for i in va.split(250): t+=d.loss(level.quantizer.lookup(Z[i]),X[i].long()).item()
print('RESULT',sys.argv[1],minutes,'val bits/dim(784)',round(t/5000/784/0.693147,4),'steps',step,'wall',round(time.time()-w0),flush=True)
