# A cluster with private nodes, some for everything else, and a pool of GPU nodes that only pods with GPUs use.

resource "google_service_account" "nodes" {
  project      = var.project
  account_id   = "${var.name}-nodes"
  display_name = "Nodes of ${var.name}"
}

resource "google_project_iam_member" "nodes" {
  for_each = toset(["roles/container.defaultNodeServiceAccount", "roles/artifactregistry.reader"])

  project = var.project
  role    = each.value
  member  = google_service_account.nodes.member
}

resource "google_container_cluster" "this" {
  project                     = var.project
  name                        = var.name
  location                    = var.region
  node_locations              = var.zones
  network                     = var.network.network
  subnetwork                  = var.network.subnetwork
  networking_mode             = "VPC_NATIVE"
  datapath_provider           = "ADVANCED_DATAPATH" # network policies
  remove_default_node_pool    = true
  initial_node_count          = 1
  enable_intranode_visibility = true
  enable_shielded_nodes       = true
  resource_labels             = { app = "tidewright" }

  release_channel {
    channel = "REGULAR"
  }

  ip_allocation_policy {
    cluster_secondary_range_name  = var.network.pods_range
    services_secondary_range_name = var.network.services_range
  }

  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = true
    master_ipv4_cidr_block  = var.control_plane_cidr
  }

  master_authorized_networks_config {
    cidr_blocks {
      cidr_block = var.authorized_cidr
    }
  }

  master_auth {
    client_certificate_config {
      issue_client_certificate = false
    }
  }

  workload_identity_config {
    workload_pool = "${var.project}.svc.id.goog"
  }

  binary_authorization {
    evaluation_mode = "PROJECT_SINGLETON_POLICY_ENFORCE"
  }

  # Of the default pool, which is removed at once.
  node_config {
    service_account = google_service_account.nodes.email
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }

  lifecycle {
    ignore_changes = [node_config]
  }
}

resource "google_container_node_pool" "system" {
  project            = var.project
  name               = "system"
  cluster            = google_container_cluster.this.id
  initial_node_count = 1 # in each zone

  autoscaling {
    total_min_node_count = 1
    total_max_node_count = 4
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = var.system_machine_type
    image_type      = "COS_CONTAINERD"
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }
}

# GKE taints nodes with GPUs itself (nvidia.com/gpu=present:NoSchedule), and runs the device plugin.
resource "google_container_node_pool" "gpu" {
  project = var.project
  name    = "gpu"
  cluster = google_container_cluster.this.id

  autoscaling {
    total_min_node_count = var.gpu_nodes.min
    total_max_node_count = var.gpu_nodes.max
    location_policy      = "ANY" # wherever there are GPUs
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = var.gpu.machine_type
    image_type      = "COS_CONTAINERD"
    disk_size_gb    = var.gpu_disk_gb
    disk_type       = "pd-ssd"
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    labels          = { "tidewright/pool" = "gpu" }

    guest_accelerator {
      type  = var.gpu.type
      count = var.gpu.count
      gpu_driver_installation_config {
        gpu_driver_version = "LATEST"
      }
    }
    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }
}
