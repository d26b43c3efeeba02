//! Copies that are to be elsewhere: spares made, disks and nodes removed, disks made equally full.

use crate::cli::{DiskRemoveArguments, NodeRemoveArguments, SpareMakeArguments, Topology};
use crate::client::Client;
use crate::failure::{Failure, OK};
use crate::{map, output};
use mirror_net::control::{OperatorRequest, Redistribution, RedistributionOrder};
use std::path::Path;

/// `mirrorctl spare make`.
pub async fn make_spare(config: &Path, arguments: SpareMakeArguments) -> Result<u8, Failure> {
    let SpareMakeArguments { node, disk, onto, dry_run } = arguments;
    if let Some(disk) = disk.as_ref().filter(|disk| !disk.contains('/')) {
        return Err(Failure::usage(format!(
            "--disk wants NODE/DISK and not {disk:?}; for all disks of a node: mirrorctl spare make {disk}"
        )));
    }
    if let Some(node) = node.as_ref().filter(|node| node.contains('/')) {
        return Err(Failure::usage(format!(
            "{node:?} is no node; for one disk: mirrorctl spare make --disk {node}"
        )));
    }
    let Some(emptied) = disk.or(node) else {
        return Err(Failure::usage("spare make wants a node, or --disk NODE/DISK"));
    };
    redistribute(config, Redistribution::Spare { emptied, onto }, dry_run).await
}

/// `mirrorctl disk remove`.
pub async fn remove_disk(config: &Path, arguments: DiskRemoveArguments) -> Result<u8, Failure> {
    let DiskRemoveArguments { disk, onto, dry_run } = arguments;
    redistribute(config, Redistribution::RemoveDisk { disk, onto }, dry_run).await
}

/// `mirrorctl node remove`.
pub async fn remove_node(config: &Path, arguments: NodeRemoveArguments) -> Result<u8, Failure> {
    let NodeRemoveArguments { node, onto, force, dry_run } = arguments;
    redistribute(config, Redistribution::RemoveNode { node, onto, force }, dry_run).await
}

/// `mirrorctl rebalance`.
pub async fn rebalance(config: &Path, dry_run: bool) -> Result<u8, Failure> {
    redistribute(config, Redistribution::Balance, dry_run).await
}

/// `mirrorctl topology`.
pub async fn topology(
    config: &Path,
    topology: Option<Topology>,
    copies: Option<u8>,
    dry_run: bool,
) -> Result<u8, Failure> {
    if let Some(Topology(topology)) = topology {
        return redistribute(config, Redistribution::Topology { topology, copies }, dry_run).await;
    }
    let map = map::ask_at(&Client::from_config(config)?).await?;
    let named = map.topology.map_or("any that the rules allow", mirror_net::map::Topology::name);
    let kept = match map.topology.and_then(|topology| map.deviation(topology)) {
        Some(what) => format!("; not kept: {what}: mirrorctl rebalance"),
        None => String::new(),
    };
    output::print(&format!("topology {named}{kept}"));
    Ok(OK)
}

pub(crate) async fn redistribute(config: &Path, wish: Redistribution, dry_run: bool) -> Result<u8, Failure> {
    let request = OperatorRequest::Redistribute(RedistributionOrder { wish, carry_out: !dry_run });
    Client::from_config(config)?.order(&request, dry_run).await
}
