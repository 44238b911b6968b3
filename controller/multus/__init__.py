"""SpiderMultusConfigs: their admission, the NetworkAttachmentDefinitions made of them, and what pods get by them."""
