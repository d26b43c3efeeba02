//! Disks and nodes that enter a cluster.

use crate::cli::{DiskAddArguments, NodeAddArguments};
use crate::client::{Client, load_file};
use crate::failure::{Failure, OK};
use crate::{map, output};
use mirror_net::control::{EnrolOrder, Entrant, OperatorRequest};
use mirror_net::map::DistributionMap;
use std::path::Path;

/// `mirrorctl disk add`.
pub async fn add_disk(config: &Path, arguments: DiskAddArguments) -> Result<u8, Failure> {
    let DiskAddArguments { disk, path, segments, spare, force, if_new, dry_run } = arguments;
    if !path.is_absolute() {
        return Err(Failure::usage(format!(
            "{} is no path that begins with /: it is one on the disk's node, which need not be this machine",
            path.display()
        )));
    }
    let client = Client::from_config(config)?;
    let named = |map: &DistributionMap| map.disks.iter().any(|other| map.disk_name(other.id) == disk);
    if if_new && named(&*map::ask_at(&client).await?) {
        output::print(&format!("{disk} is in the cluster already"));
        return Ok(OK);
    }
    let path = path.to_string_lossy().into_owned();
    let what = Entrant::Disk { disk, path, segments: segments.0, spare };
    let order = EnrolOrder { what, force, carry_out: !dry_run };
    client.order(&OperatorRequest::Enrol(order), dry_run).await
}

/// `mirrorctl node add`.
pub async fn add_node(config: &Path, arguments: NodeAddArguments) -> Result<u8, Failure> {
    let NodeAddArguments { node, force, dry_run } = arguments;
    let (file, text) = load_file(config)?;
    let what = Entrant::Node { file: text, node };
    let order = EnrolOrder { what, force, carry_out: !dry_run };
    Client::from_file(&file)?.order(&OperatorRequest::Enrol(order), dry_run).await
}
