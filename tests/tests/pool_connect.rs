//! What the hooks do to `connect`.

use std::{
    fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use bridge_agent::{
    model::PortRange,
    pool::{KernelPool, Layout, Settings, attach, kernel, layout::Occupied},
};
use bridge_common::pool::counter;

fn object() -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/pool")).unwrap()
}

#[test]
fn first() {
    let settings = Settings {
        ports: vec![PortRange { first: 61001, last: 61100 }],
        destinations: vec!["127.0.0.0/8".parse().unwrap()],
        ..Settings::default()
    };
    let layout = Layout::plan(&settings, &Occupied::default()).unwrap();
    let base = PathBuf::from(format!("/sys/fs/bpf/poolt-{}", std::process::id()));
    let mount = attach::mount_point().unwrap();
    let name = format!("poolt-{}", std::process::id());
    fs::create_dir(mount.join(&name)).unwrap();
    let t = std::time::Instant::now();
    let mut pool = KernelPool::load(&object(), &base, layout).unwrap();
    println!("load {:?}", t.elapsed());
    pool.set_networks(&settings.destinations).unwrap();
    pool.attach(&mount, Path::new(&name)).unwrap();
    let procs = mount.join(&name).join("cgroup.procs");
    let mut command = Command::new("python3");
    command
        .arg("-c")
        .arg(
            r#"
import socket
l=socket.socket(); l.bind(('127.0.0.1',0)); l.listen(100)
ps=[]
for i in range(120):
    c=socket.socket()
    try:
        c.connect(l.getsockname()); ps.append(c)
    except OSError as e: print(i, e); break
import sys; sys.stdout.flush(); input()
print(sorted(c.getsockname()[1] for c in ps))
"#,
        )
        .stdout(Stdio::piped());
    unsafe { command.pre_exec(move || fs::write(&procs, "0")) };
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    let walk = pool.walk().unwrap();
    println!("{} {:?}", walk.len(), walk[0]);
    println!("{}", String::from_utf8_lossy(&Command::new("sh").arg("-c").arg("bpftool prog show | grep pool_ -A1; bpftool -j prog show | python3 -c 'import json,sys; [print(p.get(\"name\"),p.get(\"bytes_xlated\")) for p in json.load(sys.stdin)]'").output().unwrap().stdout));
    drop(child.stdin.take());
    let out = child.wait_with_output().unwrap();
    println!("{}", String::from_utf8_lossy(&out.stdout));
    let c = pool.counters().unwrap();
    println!("{c:?}");
    println!("claims {} releases {}", c[counter::CLAIMS as usize], c[counter::RELEASES as usize]);
    kernel::remove(&base).unwrap();
    drop(pool);
    fs::remove_dir(mount.join(&name)).unwrap();
}
