//! Access of ports: set, kept over restarts, gone with the sandbox.

use stacyvm_api::{PortAccess, SandboxId};
use stacyvm_engine::{Caller, EngineError};

use crate::harness::{Host, caller, create};

#[tokio::test]
async fn the_access_of_a_port_is_kept_over_a_crash() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    assert_eq!(engine.port_access(&caller(), &id, 3000).unwrap(), None, "nobody said anything");
    engine.set_port_access(&caller(), &id, 3000, PortAccess::Public).await.unwrap();
    engine.set_port_access(&caller(), &id, 3000, PortAccess::Token).await.unwrap();
    engine.set_port_access(&caller(), &id, 8080, PortAccess::Public).await.unwrap();
    engine.crash();

    let engine = host.engine().await;
    assert_eq!(engine.reachable_port(&id, 3000).await.unwrap(), Some(PortAccess::Token));
    assert_eq!(engine.reachable_port(&id, 8080).await.unwrap(), Some(PortAccess::Public));
    assert_eq!(engine.reachable_port(&id, 8081).await.unwrap(), None);
    engine.destroy(&caller(), &id).await.unwrap();
    assert!(matches!(engine.reachable_port(&id, 3000).await, Err(EngineError::SandboxNotFound(_))));
}

#[tokio::test]
async fn only_ports_of_ones_own_sandboxes_can_be_set() {
    let host = Host::new();
    let engine = host.engine().await;
    let id = create(&engine).await.id;
    let other = Caller { tenant: Some("other".to_owned()), ..caller() };
    let refused = engine.set_port_access(&other, &id, 3000, PortAccess::Public).await;
    assert!(matches!(refused, Err(EngineError::SandboxNotFound(_))), "{refused:?}");
    assert!(engine.port_access(&other, &id, 3000).is_err());
    let zero = engine.set_port_access(&caller(), &id, 0, PortAccess::Public).await;
    assert!(matches!(zero, Err(EngineError::InvalidInput(_))), "{zero:?}");
    let unknown: SandboxId = "sb-00000000000000000000".parse().unwrap();
    assert!(engine.set_port_access(&caller(), &unknown, 1, PortAccess::Public).await.is_err());
    assert_eq!(engine.port_access(&caller(), &id, 3000).unwrap(), None);
}

#[tokio::test]
async fn keys_for_other_purposes_are_not_the_agents() {
    let host = Host::new();
    let engine = host.engine().await;
    assert_eq!(engine.derived_key("previews"), engine.derived_key("previews"));
    assert_ne!(engine.derived_key("previews"), engine.derived_key("anything else"));
}
