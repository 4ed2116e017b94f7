//! Nothing but the routes of a `cluster.yaml`, in the network namespace it is started in: what the fault injection
//! kills at any moment.

use bridge_agent::routes::sources::{Desired, FileSource, Source};
use bridge_agent::routes::{Reconciler, Settings};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).ok_or_else(|| anyhow::anyhow!("usage: routes-agent CLUSTER.YAML"))?;
    let desired = Desired::default();
    let mut reconciler = Reconciler::new(Settings::default(), desired.clone())?;
    let source = Box::new(FileSource::new(path));
    let publisher = desired.register(source.kind());
    tokio::select! {
        error = reconciler.run() => Err(error.into()),
        ended = source.run(publisher) => Ok(ended?),
    }
}
